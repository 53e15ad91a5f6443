"""What runs after what: the flows, the services around them and the command line."""
