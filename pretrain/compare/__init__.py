"""Methods, backbones and seeds under an equal budget: run, measured, put in one table and one picture."""
