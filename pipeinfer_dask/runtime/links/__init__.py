"""What passes between nodes: messages, their bytes, and the connections that carry them."""
