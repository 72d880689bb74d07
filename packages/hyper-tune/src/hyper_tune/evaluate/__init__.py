"""Generation quality: answers of a trained model, and what they are worth."""
