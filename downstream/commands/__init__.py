"""The commands of this room: a module each, whose first docstring line is its line in `coma --help`."""
