"""The simulator: the same strategies, driver and report on a virtual clock, timed by a profile (docs/simulator.md)."""
