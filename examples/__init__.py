"""Runnable examples; `diag demo` runs `byte_llama`."""
