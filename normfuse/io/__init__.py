"""Reading and writing model files: hostile until shown otherwise, whole or not at all."""
