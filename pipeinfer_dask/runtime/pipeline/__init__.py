"""All nodes as one pipeline, from the client's side: opened, watched, and mended."""
