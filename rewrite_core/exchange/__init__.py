"""Exchange: rewrites in the formats that other tools read and write."""
