"""What people read: the inspection of a checkpoint, the model card, the record of what was done."""
