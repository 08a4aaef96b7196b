"""How the embedded data, teachers and judges were made; nothing here runs in an experiment."""
