"""Parts of ``ptl compare``: runs read from folders and W&B, grouped by what differs, as tables and curves."""
