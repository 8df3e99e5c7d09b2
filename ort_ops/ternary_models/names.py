"""The files of a folder for onnxruntime-genai, and the names of the model's inputs and outputs as it is told them."""

MODEL, DATA, GENAI_CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
PAST, PRESENT = "past_key_values", "present"
INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "past_key_names": f"{PAST}.%d.key",
    "past_value_names": f"{PAST}.%d.value",
}
OUTPUTS = {
    "logits": "logits",
    "present_key_names": f"{PRESENT}.%d.key",
    "present_value_names": f"{PRESENT}.%d.value",
}
