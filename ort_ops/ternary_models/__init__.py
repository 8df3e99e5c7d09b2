"""Ternary language models that others have trained, read from their files and written as a folder for onnxruntime-genai."""
