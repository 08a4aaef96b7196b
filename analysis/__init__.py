"""Tables, figures and reports from run folders and committed records (torch-free)."""
