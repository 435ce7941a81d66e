"""Library code behind the analysis tools."""
