"""What demo.py is made of: the plan of its commands, their running, and the page that shows what came out."""
