-- Says with which spec, of more samples, the next epoch is to be planned.
-- KEYS: head. ARGV: uid, what was said before ('' if nothing), the spec. Returns "extended", "changed" or "gone".
local h = redis.call('HMGET', KEYS[1], 'uid', 'next_spec', 'spec')
if h[1] ~= ARGV[1] then
  return 'gone'
end
if (h[2] or '') ~= ARGV[2] then
  return h[2] == ARGV[3] and 'extended' or 'changed'
end
redis.call('HSETNX', KEYS[1], 'birth_spec', h[3])
redis.call('HSET', KEYS[1], 'next_spec', ARGV[3])
return 'extended'
