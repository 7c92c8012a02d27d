"""The ways to run an opened folder: this package's own decoder, or onnxruntime. `Engine` holds one of them.

Each module has a class with `folder_type`, a constructor that takes the folder, `session` and `close`.
"""
