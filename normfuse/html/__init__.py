"""Pages for people, one file each: nothing is loaded, nothing is run, all text of a model is escaped."""
