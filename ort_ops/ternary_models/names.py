"""The files of a folder for onnxruntime-genai."""

MODEL, DATA, GENAI_CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
