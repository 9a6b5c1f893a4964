"""Open, save, describe, prepare and preview pictures, as files and arrays."""
