"""The output of a run for people: progress, report.html, events for TensorBoard, and the text at its end."""
