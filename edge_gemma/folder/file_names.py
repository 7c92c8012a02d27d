"""The names of a model folder's files, and of a drafter's format.

Owns: the names, so that what only looks for models imports no arrays. Does not know: what the files hold (folder.py).
"""

MANIFEST, WEIGHTS, PER_LAYER = "manifest.json", "weights.safetensors", "embed_tokens_per_layer.safetensors"
REPLACEABLE = (MANIFEST, WEIGHTS, "model.safetensors", "model.safetensors.index.json")  # one is in every model's folder
TOKENIZER, TEMPLATE, GENERATION = "tokenizer.model", "chat_template.jinja", "generation_config.json"
AUDIO_BATCH, AUDIO_STREAM = "audio_encoder.onnx", "audio_encoder_stream.onnx"
AUDIO_DATA = "audio_encoder.onnx_data"  # the weights of both
DRAFTER_FORMAT = "edge_gemma drafter folder"  # the manifest's word (drafter_folder.py)
VISION = "vision_encoder.safetensors"
VISION_GRAPH, VISION_DATA = "vision_encoder.onnx", "vision_encoder.onnx_data"  # in ONNX folders
