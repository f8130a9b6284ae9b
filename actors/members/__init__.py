"""The owner's side of an actor: its generations, who watches over them, and the way to it."""
