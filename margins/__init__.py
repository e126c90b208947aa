"""Old names of modules that are in arcshard/margins/ now; they work for one release."""
