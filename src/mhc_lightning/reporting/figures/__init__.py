"""The report's figures: sections of panels, one line per run or one heat map per gain."""
