"""Plans and runs made visible: pages and pictures that a person can look at."""
