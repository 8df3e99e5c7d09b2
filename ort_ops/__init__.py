"""How the networks are deployed: packed ternary operators for onnxruntime, export, and a torch-free runtime.

Importing this package loads nothing heavy. `ort_ops.library` needs only onnxruntime; `ort_ops.operators` needs onnx.
"""
