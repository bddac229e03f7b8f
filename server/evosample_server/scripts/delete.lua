-- Turns a head into a tombstone: from here on nothing can be read from or written to the experiment.
-- KEYS: head. ARGV: uid. Returns 1, or 0 if there is no such experiment.
local h = redis.call('HMGET', KEYS[1], 'uid', 'birth_uid')
if not h[1] and h[2] == ARGV[1] then
  return 1 -- sent again: the first answer got lost
end
if h[1] ~= ARGV[1] then
  return 0
end
redis.call('HDEL', KEYS[1], 'uid') -- which a Redis allows that is out of memory
return 1
