"""What `pilotlight` can do: one module for each group of commands, loaded when one of them is called."""
