"""One short script per published table or figure."""
