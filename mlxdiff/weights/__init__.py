"""Contents of weight files: tensors, pickles, quantized forms and their arithmetic."""
