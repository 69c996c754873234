saeFast.start();
