"""What runs in Ray's processes or reaches into them."""
