"""Features of images: computed by `coma embed`, kept in files, compared by `coma search`."""
