"""Files, rows, recipes and moments that nobody plans for: every answer is a right result or one clear error."""
