"""Attention of a prompt, with the scores of its tokens: schema, fake and reference."""
