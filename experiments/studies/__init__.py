"""Studies: several cells run for one question, and one report that answers it (`python run.py experiment=NAME`)."""
