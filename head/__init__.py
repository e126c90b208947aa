"""Old names of modules that are in arcshard/ now; they work for one release."""
