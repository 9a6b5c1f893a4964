"""What is in a file: tensors, pickles, quantized forms and their arithmetic."""
