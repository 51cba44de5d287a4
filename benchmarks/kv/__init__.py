"""Parts of `benchmarks/kv_cache.py`: tasks, methods, a small model, and decoding over compressed caches."""
