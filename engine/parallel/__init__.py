"""One model on several devices: which part is whose, and how the parts talk."""
