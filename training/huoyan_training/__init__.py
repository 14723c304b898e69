"""What the embedded demonstration model `tiny` learns from: drawings, questions and the tokenizer."""
