"""Make a folder to share from a run: `pidistill export`. A run's folder enters, a folder without training state leaves."""
