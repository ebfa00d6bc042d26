"""What the parts hand to each other: graphs and their rules, integer expressions, the loop IR, regions, ops of fxopt's."""
