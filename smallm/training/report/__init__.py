"""Report pages, comparison pages and plots of runs."""
