"""Wrong command lines and damaged files, and what every script should answer to them."""
