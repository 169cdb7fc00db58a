"""The benchmark and the static proof of the ops (floor 3), on one registry of cases that the tests share."""
