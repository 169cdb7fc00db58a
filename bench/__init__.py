"""The benchmark and the static proof of the ops, on one registry of cases that the tests share. Floor 3."""
