"""Starting ranks on this machine, joining their process group, and noticing that one died."""
