"""From the files a run leaves behind to plots and one self-contained HTML page."""
