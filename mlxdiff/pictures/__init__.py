"""Pictures as files and arrays: open, save, describe, prepare, preview."""
