"""Where functions live: today in this process; scale to zero comes here."""
