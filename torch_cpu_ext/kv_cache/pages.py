"""Pages of keys and values, and attention over them: schema, fake and reference of each op, side by side."""
